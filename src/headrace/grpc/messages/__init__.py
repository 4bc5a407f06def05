"""The messages of `headrace/grpc/protos`, generated; `python -m tests.grpc.test_protos` writes them anew."""
