"""What `fastlm bench` measures and how: workloads, floors, interleaved rounds, tables, plots."""
