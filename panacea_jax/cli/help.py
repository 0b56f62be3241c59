"""What ``--help`` prints."""

from panacea_jax.cli.commands import COMMANDS
from panacea_jax.cli.flags import FLAGS, PROCESS_FLAGS


def usage() -> str:
    """Of ``panacea`` without a command: all of them."""
    lines = [
        "usage: panacea <command> [--config=RECIPE[:variant]] [--config.KEY=VALUE …] [--workdir=DIR]",
        "",
        "commands:",
    ]
    lines += [f"  {name:<11} {command.summary}" for name, command in COMMANDS.items()]
    lines += [
        "",
        "panacea <command> --help shows the command's flags and every config key with its default.",
    ]
    return "\n".join(lines)


def command_help(name: str) -> str:
    """Of one command: its flags and the configuration."""
    from ml_collections.config_flags import config_path

    from panacea_jax import config as config_module

    command = COMMANDS[name]
    lines = [
        f"panacea {name}: {command.summary}",
        "",
        "flags:",
        "  --config=RECIPE[:variant]  a file, or the name of one that comes with the package; without it the defaults below",
    ]
    for flag in command.flags:
        text, default = FLAGS[flag]
        lines.append(f"  --{flag}={'…' if default == '' else str(default).lower()}  {text}")
    if command.several:
        lines += ["", "as one of several processes (docs/processes.md):"]
        lines += [f"  --{flag}=…  {text}" for flag, text in PROCESS_FLAGS.items()]
    lines += ["", "config keys (override with --config.KEY=VALUE):"]
    default = config_module.get_config()
    lines += [
        f"  {key} = {config_path.get_value(key, default)!r}" for key in config_module.keys(default)
    ]
    return "\n".join(lines)
