"""Without transformers (the extra `hf`) nothing here is collected."""

try:
    import transformers
except ImportError:
    collect_ignore_glob = ["test_*.py"]
else:
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
