"""HTTP/2 and gRPC over asyncio: connections, a server and a client. Of Headrace it imports only `foundation`."""
