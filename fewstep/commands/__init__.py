"""What each command does, top to bottom; a file a command, and what several of them open."""
