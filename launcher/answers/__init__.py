"""What verbs answer with --json, as types: `maskwright schema --answers` prints their JSON schema."""
