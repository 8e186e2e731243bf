"""One module per backend; `fastlora.dispatch` finds them by listing this folder."""
