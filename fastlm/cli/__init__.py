"""The command line: fastlm doctor, demo, bench, tune."""


def main() -> None:
    """Runs the command that the arguments name."""
    from .app import app

    app()
