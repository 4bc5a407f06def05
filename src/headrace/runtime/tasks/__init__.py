"""Tasks: their specifications, payload codecs, call options, contexts and schedules."""
