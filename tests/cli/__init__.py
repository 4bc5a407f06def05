"""Every command as a person meets it."""
