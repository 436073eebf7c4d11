"""The bank: all that train time leaves on disk and all that test time reads."""
