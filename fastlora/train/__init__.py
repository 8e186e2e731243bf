"""What the `fastlora` command runs."""
