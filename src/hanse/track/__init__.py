"""What happened: run folders, progress, figures and reports."""
