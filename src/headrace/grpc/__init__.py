"""The task broker's wire: gRPC over HTTP/2, on the HTTP port."""
