"""The figures and tables of the paper, and those its reviewers asked for, as functions of banks and results."""
