"""Everything that carries bytes: S3, LTS, tar, hashing, memory. Contracts are in ``interfaces``."""
