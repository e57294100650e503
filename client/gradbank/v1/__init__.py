"""Generated from protos/gradbank/v1 by `make protos`; do not edit."""
