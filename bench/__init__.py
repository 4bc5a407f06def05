"""Measurements: scenarios of Headrace beside the floors they stand on."""
