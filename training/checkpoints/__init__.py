"""What is saved of a run, and how it is taken up again: folders, checksums, one run in a folder at a time."""
