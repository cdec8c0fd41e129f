//! Layer 2: owns what is on disk. Nothing enters unverified.
