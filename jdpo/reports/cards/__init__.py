"""The README.md of an exported model."""
