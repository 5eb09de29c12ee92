"""The Triton kernels of rnnfast, installed as `rnnfast.triton_kernels`."""

# The top-level name `triton_kernels` belongs to another project: whoever imports it must get that
# project, or this error, and never these files (a checkout of rnnfast on sys.path is enough).
if __name__ != "rnnfast.triton_kernels":
    raise ImportError(
        f"these are the Triton kernels of rnnfast, imported as {__name__!r}: import them as "
        "rnnfast.triton_kernels (and take the checkout of rnnfast off sys.path if you want the "
        "project triton_kernels)",
        name=__name__,
    )
