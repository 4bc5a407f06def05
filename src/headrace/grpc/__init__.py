"""gRPC on the HTTP port: a general transport, and Sentry's task broker protocol on top of it."""
