"""Models and ways of prompting them, compared on the same held-out rows."""
