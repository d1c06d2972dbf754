"""What in a data set will hurt: checks of every row and of all rows together, with file and line."""
