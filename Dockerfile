# What every node runs: Python, the lock's packages, raymoe and the jobs in /app, as a user that is not root.
#
#     docker build --tag registry.example.com/raymoe:0.1.0 .
#     docker build --tag registry.example.com/raymoe:0.1.0 --build-arg TORCH=cpu .      a CPU-only torch, 4 GB smaller

FROM python:3.11-slim

# A C compiler builds what is optional and faster; `ray up` copies files with rsync.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ gcc libc6-dev make procps rsync \
    && rm -rf /var/lib/apt/lists/*

# uid 1000 is also the user of most machines' images: what `ray up` mounts belongs to it.
RUN useradd --uid 1000 --create-home raymoe && install --directory --owner=raymoe /app /mnt/raymoe

# `ray up` and KubeRay run commands in a login shell, which sets PATH anew.
RUN echo 'export PATH=/app/.venv/bin:$PATH' > /etc/profile.d/raymoe.sh
ENV PATH=/app/.venv/bin:$PATH RAYMOE_HOME=/mnt/raymoe RAY_USAGE_STATS_ENABLED=0

USER 1000
WORKDIR /app

# The packages are a layer of their own: it is built again when the lock changes, not when code does.
COPY --chown=1000 Makefile pyproject.toml uv.lock README.md LICENSE ./
COPY --chown=1000 raymoe/__init__.py raymoe/
ARG TORCH=lock
RUN make setup TORCH=${TORCH} && rm -rf /home/raymoe/.cache
COPY --chown=1000 . .

CMD ["python", "jobs/doctor.py"]
