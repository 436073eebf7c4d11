"""What the command line shows: errors, progress, tables, and the chat."""
