"""What is brought over from other tools, one file per tool."""
