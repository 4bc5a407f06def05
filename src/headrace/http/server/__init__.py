"""The ASGI app, the server that serves it, and the endpoints about the server itself."""
