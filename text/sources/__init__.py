"""Files, folders and data sets as rows with their places."""
