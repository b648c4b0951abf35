# Image of every node: Python, the locked packages, raymoe and the jobs in /app, with a user that is not root.
#
#     docker build --tag registry.example.com/raymoe:0.1.0 .
#     docker build --tag registry.example.com/raymoe:0.1.0 --build-arg TORCH=cpu .      CPU-only torch, 4 GB smaller

FROM python:3.11-slim

# A C compiler builds the optional native kernels; `ray up` copies files with rsync.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ gcc libc6-dev make procps rsync \
    && rm -rf /var/lib/apt/lists/*

# Most machine images have a user with uid 1000, which owns the folders that `ray up` mounts.
RUN useradd --uid 1000 --create-home raymoe && install --directory --owner=raymoe /app /mnt/raymoe

# `ray up` and KubeRay run commands in a login shell, which resets PATH.
RUN echo 'export PATH=/app/.venv/bin:$PATH' > /etc/profile.d/raymoe.sh
ENV PATH=/app/.venv/bin:$PATH RAYMOE_HOME=/mnt/raymoe RAY_USAGE_STATS_ENABLED=0

USER 1000
WORKDIR /app

# A separate layer for the packages: a change of code does not rebuild it, a change of the lock does.
COPY --chown=1000 Makefile pyproject.toml uv.lock README.md LICENSE ./
COPY --chown=1000 raymoe/__init__.py raymoe/
ARG TORCH=lock
RUN make setup TORCH=${TORCH} && rm -rf /home/raymoe/.cache
COPY --chown=1000 . .

CMD ["python", "jobs/doctor.py"]
