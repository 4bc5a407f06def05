"""Sentry's task broker protocol: activations in, deliveries to workers by pull and push, reports back."""
