"""Reports to look at: `report.html` of an evaluation, `curves.html` of a training run, and their numbers as files."""
