"""videos → features: decode, S3D, the sharded store, captions. Import its modules; nothing loads here."""
