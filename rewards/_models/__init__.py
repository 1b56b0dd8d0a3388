"""Networks behind rewards: loading, proving, preprocessing."""
