"""What was found, for people: tables, pictures and pages. Nothing here asks a model or decides anything."""
