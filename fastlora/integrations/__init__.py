"""The only place that imports transformers, peft and trl."""
