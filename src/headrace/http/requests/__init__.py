"""Request handling that all APIs share: authentication, bodies, items, errors, long polls, metrics."""
