"""The inference engines under test: one file each, one surface for all (`engine`)."""
