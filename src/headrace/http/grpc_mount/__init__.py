"""gRPC services on the HTTP port: Headrace's broker, health, and Sentry's task broker."""
