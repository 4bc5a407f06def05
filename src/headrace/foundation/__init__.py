"""Words and bounds that every floor above shares: errors, ids, limits, settings."""
