"""Generated from `protos/grpc/health/v1/health.proto` by `python -m tests.grpc.test_protos`; not to be edited."""

from headrace.grpc.messages.pool import built

built(
    globals(),
    b'\n\x1bgrpc/health/v1/health.'
    b'proto\x12\x0egrpc.health.v1".\n'
    b'\x12HealthCheckRequest\x12\x18\n\x07s'
    b'ervice\x18\x01 \x01(\tR\x07service"\xb1\x01'
    b'\n\x13HealthCheckResponse\x12I\n'
    b'\x06status\x18\x01 \x01(\x0e21.grpc.hea'
    b'lth.v1.HealthCheckRespon'
    b'se.ServingStatusR\x06status'
    b'"O\n\rServingStatus\x12\x0b\n\x07UNK'
    b'NOWN\x10\x00\x12\x0b\n\x07SERVING\x10\x01\x12\x0f\n\x0bN'
    b'OT_SERVING\x10\x02\x12\x13\n\x0fSERVICE_'
    b'UNKNOWN\x10\x032\xae\x01\n\x06Health\x12P\n\x05'
    b'Check\x12".grpc.health.v1.H'
    b'ealthCheckRequest\x1a#.grpc'
    b'.health.v1.HealthCheckRe'
    b'sponse\x12R\n\x05Watch\x12".grpc.h'
    b'ealth.v1.HealthCheckRequ'
    b'est\x1a#.grpc.health.v1.Hea'
    b'lthCheckResponse0\x01b\x06prot'
    b'o3'
)
