from assayer import cli

if __name__ == "__main__":
    # Before the imports, which take time: a password must not stand on the command line longer than it has to.
    cli.hide_passwords()
    try:
        from assayer.server.command import main
    except KeyboardInterrupt:
        raise SystemExit(130) from None

    cli.run(main, "python -m assayer.server")
