"""What a run tells about itself: layer statistics, spikes, /metrics, metrics.jsonl, terminal and report."""
