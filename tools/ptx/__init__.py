"""An emulator of PTX: compiled kernels run on CPU tensors, thread by thread, with every access checked.

`program` parses; `registers`, `effects` and `matrix` say what an instruction does, by `rules`; `memory` keeps bytes and
who touched them; `machine` runs the threads of a block; `launch` puts it under Triton's launches. What is not modelled:
the assembler, tcgen05, TMA, the order of atomics, the rounding of approximate functions, and time.
"""
