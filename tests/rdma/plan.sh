# What is tried on the two guests, in this order; guest.sh has the words.
try horovod 280 "${verbs[@]}" "${train[@]}" --set name=horovod
try mpi 280 "${verbs[@]}" "${train[@]}" --set name=mpi --set reduce.strategy=mpi
try doctor 200 "${verbs[@]}" hpc-train doctor --json
try tcp 280 "${tcp[@]}" "${train[@]}" --set name=tcp
rdma link del rxe0
/run/on n2 rdma link del rxe0
try gone 120 "${verbs[@]}" "${train[@]}" --set name=gone
