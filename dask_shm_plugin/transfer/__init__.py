"""Move values between processes."""
