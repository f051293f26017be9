"""Fine-tuning as OpenAI's API has it: files, and jobs that make adapters of them.

    routes -> service -> store      what callers wish and see, kept in SQLite
                      -> runner -> child    one `lory train` at a time, a process of its own

It must not know torch, nor how training is done: a job is a configuration file, an exit code and
lines of events.
"""
