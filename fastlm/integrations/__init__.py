"""fastlm inside models that were written without it."""
