"""Everything that is brought in from other hosts: guarded, limited, cached. Knows no requests, jobs or settings."""
