"""Tasks: data, condition and rendering."""
