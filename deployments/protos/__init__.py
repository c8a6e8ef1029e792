"""The gRPC service `zephyra.v1.Zephyra`: `zephyra.proto`, and what protoc makes of it (`make protos`)."""
