"""Features as HTML, for notebooks: everything escaped, readable in light and dark."""
