"""From the folder of a study, finished or not, to its report and to a recommended recipe."""
